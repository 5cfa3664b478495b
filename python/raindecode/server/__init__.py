"""An OpenAI-compatible HTTP server over one Decoder. Needs the extra `server` (pip install 'rainkernels[server]')."""
