"""Who imports whom: the table of what the wings may import, the graph of the files, and its picture in ARCHITECTURE.md.

Run it after a change of imports or modules; the tests say when that is due.
"""
import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ['rakuten_mm', 'serving', 'zenml_pipelines', 'deploy', 'benchmarks', 'scripts']

# In the order of the straight line: each wing of `rakuten_mm` may import those above it that its line names.
ALLOWED = {
    'api': '',
    'client': 'api',
    'core': '',
    'stats': '',
    'sources': 'core',
    'data': 'core sources',
    'synthetic': 'core data',
    'models': 'core stats data',
    'training': 'core stats data models',
    'evaluation': 'core stats data models',
    'registry': 'core stats data models evaluation',
    'monitoring': 'api core stats data models registry',
    'cli': 'api core stats sources data synthetic models training evaluation registry monitoring',
    '__main__': 'cli',
}
# What stands on the library. `data.image` is that module alone.
ABOVE = {
    'serving': 'api core stats data.image data.taxonomy data.feedback models registry monitoring.observations',
    'zenml_pipelines': ALLOWED['cli']+' serving.store',
}
BESIDE = { # Nothing else of their part imports them
    'serving.testing': ABOVE['serving']+' data', # For tests and quickstart
    'serving.cli': ABOVE['serving']+' cli.output',
    'zenml_pipelines.cli': ABOVE['zenml_pipelines']+' cli.output',
}


def modules()->list[Path]:
    "Every file of Python outside the tests."
    return sorted(p for package in PACKAGES for p in (ROOT/package).rglob('*.py') if p.name != '_modidx.py')


def find(name:str, home:Path)->Path|None:
    "The file of the repository that `import name` reads in a file of the folder `home`."
    beside = [] if (home/'__init__.py').exists() else [home]  # scripts import each other by their bare names
    for top in (ROOT, *beside):
        path = top/name.replace('.', '/')
        for p in (path.with_suffix('.py'), path/'__init__.py'):
            if name and p.is_file(): return p
    return None


def imports(path:Path)->set[Path]:
    "Files of the repository that `path` imports, inside of functions too."
    home,out = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [(a.name,) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = home[:len(home)-node.level+1] if node.level else ()
            base = '.'.join((*start, *filter(None, [node.module])))
            names = [(f'{base}.{a.name}', base) for a in node.names]
        else: continue
        for choices in names: out.add(next(filter(None, (find(n, path.parent) for n in choices)), None))
    return out-{None, path}


def module(path:Path)->str:
    "The dotted name of a file; modules of the library without `rakuten_mm.` before them."
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    return name.removeprefix('rakuten_mm.')


def part(path:Path)->str:
    "The wing that a file belongs to, or its top folder."
    return module(path).split('.')[0]


def part_graph()->dict[str, set[str]]:
    "The wings and folders, and which others each imports."
    graph = {}
    for path in modules(): graph.setdefault(part(path), set()).update(map(part, imports(path)))
    return {p: uses-{p, 'rakuten_mm'} for p,uses in graph.items() if p != 'rakuten_mm'}


def reachable(graph:dict[str, set[str]], start:Iterable[str])->set[str]:
    "Everything that `start` imports, by way of others too."
    seen,todo = set(), list(start)
    while todo:
        if (p := todo.pop()) not in seen: seen.add(p); todo += graph.get(p, ())
    return seen


def arrows(graph:dict[str, set[str]])->Iterator[str]:
    "Lines of a Mermaid graph; an arrow that a longer way says already is left out."
    for p,uses in graph.items():
        for u in sorted(uses):
            others = {v for other in uses-{u} for v in graph.get(other, ())}
            if u not in reachable(graph, others): yield f'    {p} --> {u}'


def table()->Iterator[str]:
    "Lines of a Markdown table: what each wing is for, what it may import and which modules it has."
    yield '| wing | what it is for | may import | modules |\n|---|---|---|---|'
    for wing,may in ALLOWED.items():
        folder = ROOT/'rakuten_mm'/wing
        path = folder/'__init__.py' if folder.is_dir() else folder.with_suffix('.py')
        if not path.is_file(): continue
        files = sorted(p for p in folder.glob('*.py') if p != path)
        links = ' '.join(f'[{p.stem}]({p.relative_to(ROOT).as_posix()})' for p in files)
        doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
        where = folder if folder.is_dir() else path
        yield f"| [`{wing}`]({where.relative_to(ROOT).as_posix()}) | {doc.splitlines()[0]} | {may or '-'} | {links} |"


def picture()->str:
    "The part of ARCHITECTURE.md that is made from the code."
    graph = {p: uses for p,uses in part_graph().items() if p in {*ALLOWED, *ABOVE}}
    return '\n'.join(['```mermaid', 'flowchart TD', *arrows(graph), '```', '', *table()])


def renew(text:str)->str:
    "The text of ARCHITECTURE.md with the picture of today."
    return re.sub(r'(<!-- wings.*?-->\n).*?(<!-- /wings -->)', lambda m: f'{m[1]}{picture()}\n{m[2]}', text, flags=re.S)


if __name__ == '__main__':
    path = ROOT/'ARCHITECTURE.md'
    path.write_text(renew(path.read_text(encoding='utf-8')), encoding='utf-8')
