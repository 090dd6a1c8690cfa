"""Where keys and values live: `RedKnotCache`, its layers, and the pages that rows of tokens lie in."""
