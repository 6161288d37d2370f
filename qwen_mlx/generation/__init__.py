"""From a prompt to text: the token loop, sampling, drafts, prompt caches, conversations and tools."""
