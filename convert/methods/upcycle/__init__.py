"""Sparse upcycling: the dense feed-forward network becomes the experts of a mixture.

Sources: Sparse Upcycling 2212.05055; granular experts 2410.07524; Drop-Upcycling 2502.19261;
Branch-Train-MiX 2403.07816.
"""
