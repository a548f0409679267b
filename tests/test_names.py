"One public name, one meaning: no function, class or constant of the library is called like another one."
import ast
from collections import defaultdict

from conftest import ROOT

TWICE:dict[str, str] = {}  # Reason by name, where two modules may define the same


def public(path)->list[str]:
    "Names in `__all__` of a generated module, without methods."
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return [n for n in ast.literal_eval(node.value) if '.' not in n]
    return []


def test_no_public_name_means_two_things():
    modules = defaultdict(list)
    for path in sorted((ROOT/'rakuten_mm').rglob('*.py')):
        for name in public(path): modules[name].append('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    assert len(modules) > 300
    assert {n: where for n,where in modules.items() if len(where) > 1 and n not in TWICE} == {}
