"""What serve_openai_api.py is made of: request bodies, the answers' parser, grammars, the engine's thread, metrics."""
