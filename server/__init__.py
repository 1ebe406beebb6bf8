"""What serve_openai_api.py is made of: routes, request bodies, answers, grammars, the engine's thread, metrics."""
