"""What the ranks of a run share: process groups, collectives, the sharded vocabulary, agreement about failures."""
