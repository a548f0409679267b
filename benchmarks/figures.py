"""Write the figures of `results/*.json` into the front page (nbs/index.ipynb).

    python -m benchmarks.figures && python scripts/build_docs.py --readme

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`, with a column for each result of the benchmark NAME.
"""
import json
import re

from benchmarks.harness import RESULTS, ROOT

INDEX = ROOT/'nbs'/'index.ipynb'
MARK = re.compile(r'(<!-- figures: (\w+) -->\n).*?(<!-- end -->)', re.S)
POINTS,SHARE = (lambda x: f'{100*x:.1f} points'), (lambda x: f'{100*x:.0f} %')
TIMES,SECONDS,MS = '{:.1f} times'.format, '{:.1f} s'.format, '{:.0f} ms'.format
# By benchmark: the key of a figure, its meaning, its form, and what earlier work set as its bar
TABLES = {
    'retraining': [
        ('largest_lag', 'macro F1 of the champion behind a model trained from scratch, worst month', POINTS, '≤ 2'),
        ('compute_ratio', 'compute of the loop over that of training from scratch', SHARE, '≤ 15 %'),
        ('sabotaged_refused', 'spoilt challengers refused, each for its reason', SHARE, '100 %'),
        ('equal_refused', 'an equal challenger refused', SHARE, '100 %'),
        ('better_promoted', 'test sets of 3,000 listings that promote one that is 1.5 points better', SHARE, '≥ 90 %'),
        ('active_over_random', 'gain of correcting the most useful listings over that of random ones', TIMES, '≥ 2')],
    'quality': [
        ('weighted_f1', 'weighted F1', '{:.3f}'.format, ''), ('macro_f1', 'macro F1', '{:.3f}'.format, ''),
        ('weighted_f1_margin', 'weighted F1 above the best baseline', POINTS, '≥ 1.5'),
        ('over_kernel', 'weighted F1 above a kernel machine on the same vectors', POINTS, '≥ 0'),
        ('macro_f1_margin', 'macro F1 above the best baseline', POINTS, '≥ 1'),
        ('ece', 'calibration error', '{:.3f}'.format, '≤ 0.02'),
        ('promise_held', 'guarantee of `auto` held', SHARE, '≥ 95 %')],
    'inference': [
        ('image_speedup', 'images, over PyTorch as it comes', TIMES, ''),
        ('text_speedup', 'texts, over the same', TIMES, ''),
        ('predictor_ratio', 'whole listings, over the bare costs', SHARE, '')],
    'batch_inference': [
        ('rows_per_s', 'listings with pictures from file to file, a second', '{:.0f}'.format, ''),
        ('speedup', 'the same, over the command before it kept every core at work', TIMES, '≥ 1.3'),
        ('rss_growth', 'memory for 100,000 listings, over that for 5,000', '{:.2f} times'.format, '≤ 1.05'),
        ('killed_then_same_bytes', 'of three killed runs, given again to the same bytes', str, '3')],
    'training': [
        ('warm_over_cold', 'training on stored vectors, over the first training', SHARE, '≤ 10 %'),
        ('delta_over_cold', 'training after 1 % new listings, over the first training', SHARE, '≤ 5 %'),
        ('epoch_over_bare', 'an epoch of fine-tuning, over its bare arithmetic', TIMES, '')],
    'serving': [
        ('vs_fastapi', 'products per second, over a plain FastAPI app', TIMES, ''),
        ('vs_predictor', 'the same, over the library without a server', TIMES, ''),
        ('overhead_ms', 'latency on top of the model', MS, '≤ 10'),
        ('p99_over_p50', 'slowest percent over the median', TIMES, '≤ 3'),
        ('shed_ms', 'a refusal at ten times the capacity, slowest percent', MS, '≤ 50'),
        ('recovery_s', 'back to normal after it', SECONDS, '≤ 2'),
        ('rss_growth', 'memory grown in 10,000 requests', SHARE, '≤ 5 %'),
        ('swap_failed_requests', 'requests lost when the model changes', str, '0')],
    'distillation': [
        ('gain_with_test', 'weighted F1 of a student with a teacher, above the same alone', POINTS, '≥ 0.5')],
    'ablation': [
        ('spread', 'points of weighted F1 between two seeds of one change', '{:.2f}'.format, '')],
    'gpu': [
        ('train_images_per_s', 'ConvNeXt-Large at 500 px, trained, a second', '{:.0f}'.format, ''),
        ('train_mfu', 'share of the peak in bf16', SHARE, ''),
        ('encode_images_per_s', 'the same, encoded, a second', '{:.0f}'.format, '')],
    'soak': [
        ('lost', 'honest requests lost while the model was up', str, '0'),
        ('late', 'or above their deadline', str, '0'),
        ('p99_ms', 'slowest percent of them', MS, ''),
        ('recovery_s', 'ready again after a kill or freeze', SECONDS, ''),
        ('wrong_statuses', 'wrong answers to hostile requests', str, '0'),
        ('rss_growth', 'memory grown', SHARE, '≤ 10 %')],
    'ingestion': [
        ('rows_per_s', 'listings per second', '{:.0f}'.format, ''),
        ('peak_rss_growth', 'memory for four times the listings', TIMES, ''),
        ('delivery_over_first', '1 % new listings, over the first ingestion', SHARE, ''),
        ('killed_then_same_bytes', 'of ten killed runs, run again to the same bytes', str, '10')],
    'drift': [
        ('alarm_in_first_drifted', 'alarms in the first tenth that drifted', SHARE, ''),
        ('false_alarms', 'false alarms', SHARE, ''), ('named_rightly', 'causes named rightly', SHARE, '')],
    'recovery': [('slowest_recovery_s', 'all healthy after the worst SIGKILL', SECONDS, '')]}


def about(r:dict)->str:
    "Where and when a result was measured."
    m = r['machine']
    took = f"{r['seconds']/60:.0f} minutes" if r['seconds'] >= 120 else f"{r['seconds']} s"
    source = f", from a {r['source']}" if 'source' in r else ''
    where = f"{m['cores']} cores of {m['cpu']} ({m['instructions']})"
    return f"{where}, {took}, commit {r['commit'][:7]}, {r['date']}{source}"


def table(name:str)->str:
    "Markdown of a benchmark's results; nothing if there are none."
    results = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in sorted(RESULTS.glob('*.json'))}
    results = {n.removeprefix(f'{name}-'): r for n,r in results.items() if r['benchmark'] == name}
    if not results: return ''
    columns = [n if n != name else 'measured' for n in results]
    lines = [f"| `python -m benchmarks.{name}` | {' | '.join(columns)} | bar |", '|---|'+'---|'*(len(columns)+1)]
    for key,meaning,form,bar in TABLES[name]:
        found = [form(r[key]) if r.get(key) is not None else '' for r in results.values()]
        if any(found): lines.append(f"| {meaning} | {' | '.join(found)} | {bar} |")
    where = ' '.join(f'{about(r)}.' for r in results.values())
    return '\n'.join(['', *lines, '', where, '', ''])


def filled(text:str)->str:
    "A text with its tables as the results have them."
    return MARK.sub(lambda m: m[1]+table(m[2])+m[3], text)


def main():
    "Fill the front page."
    nb = json.loads(INDEX.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = filled(''.join(cell['source'])).splitlines(True)
    INDEX.write_text(json.dumps(nb, ensure_ascii=False, indent=1)+'\n', encoding='utf-8')


if __name__ == '__main__': main()
