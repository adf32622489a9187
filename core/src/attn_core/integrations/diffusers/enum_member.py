"""A member more for an enum that has its members already, and one less again.

An enum forbids the ordinary ways: its members lie in three tables, which are written here. What is taken out leaves
nothing behind.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

#: (enum, name) -> member: one ever, so that whoever kept it since it was taken out has that which is put in again.
_made: dict[tuple[type[Enum], str], Any] = {}


def member_of(names: Any, name: str, value: str) -> Any:
    """The member `name` for a `str` enum, as the enum would have made it; it is not in there yet."""
    member = _made.get((names, name))
    if member is None:
        member = str.__new__(names, value)
        member._name_, member._value_, member._sort_order_ = name, value, len(names._member_names_)
        member.__objclass__ = names
        _made[names, name] = member
    return member


def add_member(names: Any, member: Any) -> None:
    """Puts it in, where it is not."""
    if member._value_ in names._value2member_map_:
        return
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[member._value_] = member
    type.__setattr__(names, member._name_, member)


def remove_member(names: Any, member: Any) -> None:
    """Takes it out."""
    names._member_names_.remove(member._name_)
    del names._member_map_[member._name_], names._value2member_map_[member._value_]
    type.__delattr__(names, member._name_)
