"""The whole way on a real model, SmolLM2-135M-Instruct: `make test-real`."""
