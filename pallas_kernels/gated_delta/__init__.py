"""The gated delta rule of Gated DeltaNet in chunks: one entry point, on TPUs."""
