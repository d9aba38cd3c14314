"""Restarts in other people's training loops: callbacks for Lightning and for Hugging Face's Trainer."""
