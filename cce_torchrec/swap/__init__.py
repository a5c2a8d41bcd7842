"""Swapping compressed collections into existing models: by a call (:func:`compress`), or into a script as it is.

python -m cce_torchrec.swap --config swap.yaml script.py args...
"""

from cce_torchrec.swap.model import compress
from cce_torchrec.swap.rules import CompressionPlan, CompressionRule, Rules
from cce_torchrec.swap.sharders import register_sharders

__all__ = ["CompressionPlan", "CompressionRule", "Rules", "compress", "register_sharders"]
