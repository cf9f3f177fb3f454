"""Text in and text out: tokenizers, chat templates, streams of text, reasoning and tool calls.

Nothing here imports torch, or knows a model, a request or a server.
"""
