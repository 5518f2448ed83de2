"""One file per attention mechanism: formula, functional form where there is one, module."""
