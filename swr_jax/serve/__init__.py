"""An HTTP server with the completions and chat format of OpenAI; `app` needs the extra `serve`."""
