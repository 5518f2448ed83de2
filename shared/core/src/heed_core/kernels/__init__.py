"""Operations that torch does not express well, each with its fake and its gradient."""
