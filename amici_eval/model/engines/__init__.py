"""`opening` chooses the engine: `hooked`, the model's own forward pass, or `factored`, which computes each sender once.

For `factored`, `folding` prepares the weights, `encoder` computes senders, and `attention` what receivers get of them.
"""
