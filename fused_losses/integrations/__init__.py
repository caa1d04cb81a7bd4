"""Inside other people's trainers, one module per library; each but Axolotl's imports its library only when called."""
