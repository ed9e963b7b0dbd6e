"""The names that PEFT's pages on prompt tuning and multitask prompt tuning document; PEFT itself is not needed.

For people who change one import: thin shells over the rest of the library. What differs from PEFT 0.21, on purpose:

- RANDOM is scaled to the embedding table. PEFT's N(0, 1), about 50 times the words of a Llama, is RANDOM_NORMAL; the
  uniform start of Lester et al. 2021 is RANDOM_UNIFORM. SAMPLE_VOCAB never draws a word twice.
- CLASS_LABELS and ARTIFACT are starts that PEFT does not have; both read `prompt_tuning_init_text`.
- Values that PEFT takes silently for something else are refused, with what is possible.
- `num_transformer_submodules` is 1 unless given. PEFT gives encoder-decoder models 2: of plain prompts it trains and
  reads the first half only; of multitask prompts it trains the second half in front of the decoder, where its generate
  never puts it.
- A multitask prompt's factors start at one, so that training begins at the shared prompt. PEFT's N(0, 0.02^2), from
  which the effective prompt begins near zero, is `factors_init="normal"`, a field that PEFT does not have.
- `prompt_tuning_init_state_dict_path` may be a directory, PEFT's or ours, and `prompt_tuning_init_task` a name where
  the directory has names. A torch pickle is never opened. With `inference_mode` the path is not looked at, and loading
  a trained prompt never asks for it; PEFT opens it again each time.
"""

from softprompts.model.peft.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from softprompts.model.peft.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from softprompts.model.peft.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from softprompts.model.peft.prompt_tuning import PeftType as PeftType
from softprompts.model.peft.prompt_tuning import PromptEmbedding as PromptEmbedding
from softprompts.model.peft.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from softprompts.model.peft.prompt_tuning import PromptTuningInit as PromptTuningInit
from softprompts.model.peft.prompt_tuning import TaskType as TaskType
