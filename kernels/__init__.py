"""The operations in Triton: any tile, any batch, the reference's bits."""
