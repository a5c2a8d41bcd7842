"""TorchX components: ``torchx run launch/components.py:dlrm`` starts the example on one node or many."""
