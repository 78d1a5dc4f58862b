"""gradflow: the reference laboratory for the training dynamics of deep linear networks.

The front door is `__init__.pyi`: names are imported when they are first used, so that
`gradflow --help` does not wait for JAX.
"""

import os
import sys

import lazy_loader

if os.environ.get("GRADFLOW_X64", "1") != "0":
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_enable_x64", True)
    else:
        os.environ["JAX_ENABLE_X64"] = "1"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
