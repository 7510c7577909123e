"""Which neurons form an expert, and the router tensors that follow from that without training.

Every split is a permutation of the neurons of one feed-forward layer: int64 `order` [f] in which
the first `shared` are always on and expert e is the slice [shared + e * m, shared + (e + 1) * m).
"""
