"""What must be installed before anything else here can be imported."""

import importlib.util

if importlib.util.find_spec("hypothesis") is None:
    raise ImportError(
        "gradflow.testing draws its cases with hypothesis, which is not installed; install it with "
        "pip install hypothesis, or with the other test tools: pip install 'gradflow[test]'."
    )
