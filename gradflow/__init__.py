"""gradflow: the reference laboratory for the training dynamics of deep linear networks.

The front door is `__init__.pyi`: names are imported when they are first used, so that
`gradflow --help` does not wait for JAX.
"""

import lazy_loader

from gradflow.backend.jax_settings import set_up_jax

set_up_jax()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
