"""What language models write: sampling, cached decoding, continuations, filled masks. Below the tasks, whose validation samples use it."""
