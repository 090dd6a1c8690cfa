"""Load on a server that speaks OpenAI's protocol: what is asked when, and what came of it."""
