from training_fixtures import config, corpus_folder, tamper_with_training_batches

__all__ = ["config", "corpus_folder", "tamper_with_training_batches"]
