"""The only file that knows papermill: run one notebook of nbs/runs/ and read back what it returned."""
import json
import os
from pathlib import Path

import nbformat
import papermill as pm
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.exceptions import PapermillExecutionError

RUNS = Path(__file__).parents[1]/'nbs'/'runs'
# nbconvert's page without what it would load from the web (RequireJS, MathJax, Mermaid), as wide as a page is read.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>
main {max-width: 66rem; margin: auto; padding: 0 1rem 3rem}
.jp-Cell {padding: .2rem 0}
.jp-CodeCell.jp-mod-noOutputs {display: none}
.jp-OutputArea-output {overflow-x: auto}
.jp-OutputArea-output pre {white-space: pre-wrap}
[data-mime-type="application/vnd.jupyter.stderr"] {background: none !important; color: gray}
</style>{%- endblock -%}"""


class NotebookError(RuntimeError):
    "A run notebook did not finish; the message says where and why."


def check_parameters(
    src:Path, # Run notebook
    params:dict, # Overrides of its parameters
):
    "Raises `TypeError` before any work unless `src` declares every name in `params`."
    cells = nbformat.read(src, as_version=4).cells
    if not any('parameters' in c.metadata.get('tags', []) for c in cells):
        raise TypeError(f'{src.name} has no cell tagged `parameters`; '
                        'papermill would inject values that the defaults overwrite')
    known = pm.inspect_notebook(src)
    unknown = sorted(params.keys() - known.keys())
    if unknown: raise TypeError(f"{src.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    # papermill writes names into the notebook as code
    odd = [k for k in params if not k.isidentifier()]
    if odd: raise TypeError(f'{odd} are not parameter names')


def keep(
    out_dir:Path, # Holds the executed notebook
    name:str, # Notebook, without suffix
    run_id:str, # MLflow run, or empty
):
    "Render the executed notebook, whole or not, as HTML, and store both with the run."
    nb = out_dir/f'{name}.ipynb'
    if not nb.exists(): return
    # The page is for readers, so it leaves the code to the notebook beside it, and what was said on stderr too, unless
    # that may tell why there is no result: progress bars rewrite their line there, and the last state of each stays.
    exporter = HTMLExporter(preprocessors=[CoalesceStreamsPreprocessor(enabled=True)], exclude_input=True,
                            exclude_input_prompt=True, exclude_output_prompt=True, raw_template=TEMPLATE)
    executed = nbformat.read(nb, as_version=4)
    if (out_dir/'result.json').exists():
        for c in executed.cells:
            if 'outputs' in c: c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    html,_ = exporter.from_notebook_node(executed, dict(metadata=dict(name=name)))
    nb.with_suffix('.html').write_text(html, encoding='utf-8')
    if run_id:
        from rakuten_mm.core.tracking import mlflow_client
        for p in (nb, nb.with_suffix('.html')): mlflow_client().log_artifact(run_id, str(p), 'notebooks')


def run_notebook(
    name:str, # Notebook in nbs/runs/, without suffix
    out_dir:Path, # Receives the executed notebook, its HTML and `result.json`
    run_id:str='', # MLflow run that the notebook logs to and that keeps it
    timeout_s:int|None=None, # Longest time for one cell
    progress:bool=True, # Show papermill's progress bar
    **params, # Overrides for the cell tagged `parameters`
)->dict: # Content of `result.json`, which the notebook wrote
    "Execute `name`; raises `TypeError` for an unknown parameter, `NotebookError` unless it ran to its end."
    src,out_dir = RUNS/f'{name}.ipynb',Path(out_dir).resolve()
    page = f"(its page: {out_dir/f'{name}.html'})"
    params |= dict(run_id=run_id, out_dir=out_dir)
    params = {k: os.fspath(v) if isinstance(v, Path) else v for k,v in params.items()}
    check_parameters(src, params)
    out_dir.mkdir(parents=True, exist_ok=True)
    result = out_dir/'result.json'
    result.unlink(missing_ok=True)
    try:
        as_is = lambda path: str(path).replace('{', '{{').replace('}', '}}')  # papermill puts parameters into paths
        pm.execute_notebook(as_is(src), as_is(out_dir/src.name), params, cwd=Path.cwd(), progress_bar=progress,
                            kernel_name='python3', execution_timeout=timeout_s, stderr_file=None)
    except PapermillExecutionError as e:
        raise NotebookError(f'{src.name}, cell {e.exec_count}: {e.ename}: {e.evalue} {page}') from e
    except Exception as e:  # dead kernel, timeout
        raise NotebookError(f'{src.name}: {type(e).__name__}: {e} {page}') from e
    finally: keep(out_dir, name, run_id)
    # A killed kernel can leave a notebook that looks fine: only its last act counts.
    if not result.exists(): raise NotebookError(f'{src.name} stopped before writing result.json {page}')
    return json.loads(result.read_text())
