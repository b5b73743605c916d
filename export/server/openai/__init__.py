"""The API of OpenAI: requests, answers and routes."""
