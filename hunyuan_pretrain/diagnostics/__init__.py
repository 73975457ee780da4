"""Whether two ways to train one model are the same: `parity` between layouts, `shadow` between number formats."""
