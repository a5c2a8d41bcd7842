"""What must be imported before warnings are errors."""

import warnings

with warnings.catch_warnings():  # torchmetrics 1.0.3 compares versions by distutils when it is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchmetrics  # noqa: F401
