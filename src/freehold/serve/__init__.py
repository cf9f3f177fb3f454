"""The HTTP server: dialects of one API over one engine. Nothing here prints, or opens a connection."""
