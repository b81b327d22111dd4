"""What the sample data says: tables of facts, sentence patterns, stories, and the writers that combine them."""
