"""Brief fine-tuning of dense, native-mixture and adaptive checkpoints on transformers' Trainer."""
