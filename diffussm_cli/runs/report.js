'use strict';

// Previews: a slider in place of a row.
const film = [...document.querySelectorAll('.film figure')], slider = document.querySelector('#slide input');
if (film.length > 1) {
  const show = () => film.forEach((figure, i) => figure.classList.toggle('shown', i === +slider.value));
  slider.addEventListener('input', show);
  show();
}
document.body.classList.toggle('sliding', film.length > 1);
document.body.classList.add('scripted');

// Charts: their lines with the values that were drawn, and the axis of steps, images or hours.
const LEFT = 44, RIGHT = 354, TOP = 12, BOTTOM = 150, WIDTH = 360;
const axis = document.getElementById('axis'), runs = axis ? JSON.parse(axis.dataset.runs) : [];
const numbers = text => text.split(' ').map(Number);
const shown = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en') : String(+value.toPrecision(4));

// A number of steps, images or tokens, or a time as h:mm:ss.
function placeText(value, unit) {
  if (unit !== 'hours') return Math.round(value).toLocaleString('en');
  const seconds = Math.round(3600 * value), two = number => String(number).padStart(2, '0');
  return Math.floor(seconds / 3600) + ':' + two(Math.floor(seconds / 60) % 60) + ':' + two(seconds % 60);
}

function hours(step, run) {
  let i = run.steps.findIndex(other => other >= step);
  if (i < 0) i = run.steps.length - 1;
  if (i === 0) return run.hours[0];
  const share = (step - run.steps[i - 1]) / (run.steps[i] - run.steps[i - 1] || 1);
  return run.hours[i - 1] + share * (run.hours[i] - run.hours[i - 1]);
}
const along = { steps: step => step, images: (step, run) => step * run.batch, hours };

const charts = [...document.querySelectorAll('svg.chart')].map(svg => ({
  svg,
  place: svg.parentElement.querySelector('.place'),
  values: [...svg.parentElement.querySelectorAll('.legend .value')],
  columns: [...svg.querySelectorAll('.column')],
  best: svg.querySelector('circle'),
  lines: [...svg.querySelectorAll('polyline')].map(line => ({
    line, run: runs[line.dataset.run], x: numbers(line.dataset.x), y: numbers(line.dataset.y),
    down: line.getAttribute('points').split(' ').map(point => point.split(',')[1]),
  })),
}));

function draw(chart, unit) {
  const isOfSteps = chart.svg.classList.contains('steps');
  const value = isOfSteps ? along[unit] : along.steps;
  for (const line of chart.lines) line.at = line.x.map(x => value(x, line.run));
  const start = Math.min(0, ...chart.lines.map(line => line.at[0]));
  const end = Math.max(unit === 'hours' && isOfSteps ? 1e-6 : 1, ...chart.lines.map(line => line.at.at(-1)));
  chart.across = x => LEFT + (RIGHT - LEFT) * (x - start) / (end - start);
  chart.unit = isOfSteps ? unit : 'tokens away';
  for (const line of chart.lines) {
    const points = line.at.map((x, i) => chart.across(x).toFixed(1) + ',' + line.down[i]);
    line.line.setAttribute('points', [...points, ...(points.length > 1 ? [] : points)].join(' '));
  }
  chart.columns.forEach((text, i) => { text.textContent = placeText(start + (end - start) * i / 2, chart.unit); });
  if (chart.best) chart.best.setAttribute('cx', chart.across(value(+chart.best.dataset.x, chart.lines[0].run)));
}

// The values under the pointer take the place of the last ones in the legend.
function follow(chart) {
  const rule = document.createElementNS('http://www.w3.org/2000/svg', 'line');
  const last = chart.values.map(value => value.textContent);
  for (const [name, value] of Object.entries({ class: 'pointer', y1: TOP, y2: BOTTOM, visibility: 'hidden' }))
    rule.setAttribute(name, value);
  chart.svg.append(rule);

  chart.svg.addEventListener('pointermove', event => {
    const box = chart.svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * WIDTH;
    const away = (line, i) => Math.abs(chart.across(line.at[i]) - at);
    let nearest = [chart.lines[0], 0];
    chart.lines.forEach((line, k) => {
      const i = line.at.reduce((best, _, i) => away(line, i) < away(line, best) ? i : best, 0);
      if (away(line, i) < away(...nearest)) nearest = [line, i];
      const isBeyond = at > chart.across(line.at.at(-1)) + 8;  // a run that ended earlier
      chart.values[k].textContent = isBeyond ? '–' : shown(line.y[i]);
    });
    const x = nearest[0].at[nearest[1]], where = chart.across(x);
    const text = placeText(x, chart.unit);
    chart.place.textContent = { steps: 'at step ' + text, hours: 'after ' + text + ' h' }[chart.unit] || 'at ' + text + ' ' + chart.unit;
    rule.setAttribute('x1', where);
    rule.setAttribute('x2', where);
    rule.setAttribute('visibility', 'visible');
  });
  chart.svg.addEventListener('pointerleave', () => {
    rule.setAttribute('visibility', 'hidden');
    chart.place.textContent = '';
    chart.values.forEach((value, k) => { value.textContent = last[k]; });
  });
}

// A page that loads itself again keeps the axis that was chosen.
const kept = { get: () => sessionStorage.getItem('unit'), set: unit => sessionStorage.setItem('unit', unit) };
if (axis) {
  const inputs = [...axis.querySelectorAll('input')];
  const choose = unit => charts.forEach(chart => draw(chart, unit));
  inputs.forEach(input => input.addEventListener('change', () => {
    choose(input.value);
    try { kept.set(input.value); } catch { /* storage may be forbidden */ }
  }));
  let before = null;
  try { before = kept.get(); } catch { /* the same */ }
  const chosen = inputs.find(input => input.value === before) || inputs[0];
  chosen.checked = true;
  choose(chosen.value);
  charts.forEach(follow);
}
