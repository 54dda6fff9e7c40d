"""Communication between ranks: process groups, collectives, the sharded vocabulary, agreement about failures."""
