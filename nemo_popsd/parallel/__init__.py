"""State and communication that ranks share: process groups, collectives, vocabulary shards, agreement on failures."""
