from training_fixtures import one_device

__all__ = ["one_device"]
