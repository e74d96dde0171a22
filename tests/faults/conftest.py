from training_fixtures import config, corpus_folder, one_device, tamper_with_training_batches

__all__ = ["config", "corpus_folder", "one_device", "tamper_with_training_batches"]
