"""Whose line a warning stands at."""

import pytest

from ddst.user_warning import PACKAGE, warn_user


@pytest.mark.parametrize("beside", ["_mine.py", "-tools.py"])
def test_a_file_beside_the_package_is_the_users(beside):
    inner, outer = f"{PACKAGE}inside.py", PACKAGE[:-1] + beside
    names = {"warn_user": warn_user}
    exec(compile("def within(): warn_user('x')", inner, "exec"), names)
    exec(compile("def of_the_user(): within()", outer, "exec"), names)
    with pytest.warns(UserWarning, match="x") as said:
        names["of_the_user"]()
    assert said[0].filename == outer
