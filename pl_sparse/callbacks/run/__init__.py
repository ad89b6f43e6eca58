"""Callbacks and a plugin that the application adds to every run: status.json (status), the table of epochs (history),
lines of progress (progress), masks as they change (mask_log), whole checkpoints (atomic_checkpoints), starts that runs
share (prefix), and what loggers get at the end (publish)."""
