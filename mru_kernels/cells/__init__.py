"""The cells: one file a cell, with its spec, its public function and its step."""
