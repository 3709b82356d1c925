"""What a repository is: keys, packs, index, and the chunks in them."""
