"""One model on one tissue: cell types, tests, senders, baselines, workers."""
