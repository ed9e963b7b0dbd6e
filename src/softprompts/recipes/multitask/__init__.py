"""Multitask prompt tuning, whole (Wang et al. 2023): teachers, a shared prompt, targets, beside transfer baselines."""

from softprompts.recipes.multitask.plan import ARMS, VARIANTS, Plan
from softprompts.recipes.multitask.stages import execute

__all__ = ["ARMS", "VARIANTS", "Plan", "execute"]
