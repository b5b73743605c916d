"""The torch-free runtime: session, static, dynamic and prefix cache, batch, sampling, detokenization."""
