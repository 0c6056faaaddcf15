// Search shows tutorials before modules; the other numbers are Sphinx's own.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => score + (docname.startsWith("tutorials/") ? 20 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
