const film = [...document.querySelectorAll('.film figure')], slider = document.querySelector('#slide input');
if (film.length > 1) {
  const show = () => film.forEach((figure, i) => figure.classList.toggle('shown', i === +slider.value));
  document.body.classList.add('scripted');
  slider.addEventListener('input', show);
  show();
}
