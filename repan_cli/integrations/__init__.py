"""Restart blocks in other training loops: callbacks for Lightning and for Hugging Face's Trainer."""
