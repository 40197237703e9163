// All services at a glance, what is wrong first.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Head, Row } from "./api";
import { LongList, State } from "./parts";
import { count, latency, rate, severity } from "./words";

const filters = { all: "all", wrong: "not well", refused: "refusing" };
type Filter = keyof typeof filters;

export function Services({ rows, head }: { rows: Row[]; head: Head | null }) {
  const [text, setText] = useState("");
  const [filter, setFilter] = useState<Filter>("all");
  const [by, setBy] = useState<"state" | "service" | "busy">("state");
  const search = useRef<HTMLInputElement>(null);
  useEffect(() => {
    const key = (e: KeyboardEvent) => {
      if (e.key === "/" && !(e.target instanceof HTMLInputElement)) {
        e.preventDefault();
        search.current?.focus();
      }
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);
  const shown = useMemo(() => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const some = rows.filter((r) => {
      if (filter === "wrong" && severity(r) === 0 || filter === "refused" && r.verdict !== "refused") return false;
      const where = (r.service + " " + r.listen.join(" ")).toLowerCase();
      return words.every((w) => where.includes(w));
    });
    const names = (a: Row, b: Row) => (a.service < b.service ? -1 : a.service > b.service ? 1 : 0);
    return some.sort((a, b) => {
      if (by === "state") return severity(b) - severity(a) || names(a, b);
      if (by === "busy") return b.connectionsPerSecond - a.connectionsPerSecond || b.inFlight - a.inFlight || names(a, b);
      return names(a, b);
    });
  }, [rows, text, filter, by]);
  const out = Object.entries(head?.backends ?? {}).filter(([state]) => state !== "serving");
  return (
    <section aria-label="Services">
      <div class="sum">
        <b>{count(head?.services ?? 0, "service")}</b>
        <span>{count(head?.backends?.serving ?? 0, "backend")} serving{out.map(([state, n]) => `, ${n} ${state}`)}</span>
        {head?.connections && <span>{count(head.connections.inFlight, "connection")} in flight</span>}
      </div>
      <div class="tools">
        <input ref={search} type="search" placeholder="Name or address  ( / )" aria-label="Services with this name or address" value={text} onInput={(e) => setText(e.currentTarget.value)} />
        <span role="group" aria-label="Which services">
          {(Object.keys(filters) as Filter[]).map((f) => <button type="button" aria-pressed={filter === f} onClick={() => setFilter(f)}>{filters[f]}</button>)}
        </span>
        <label>order <select value={by} onChange={(e) => setBy(e.currentTarget.value as typeof by)}>
          <option value="state">what is wrong first</option><option value="busy">busiest first</option><option value="service">by name</option>
        </select></label>
      </div>
      {rows.length === 0 && head && !head.error && <p class="none">There is no service. The configuration{head.agent ? ` (${head.agent.config.file})` : ""} has none.</p>}
      <LongList className="services" label="Services" height={44} all={shown}
        head={<><span role="columnheader">State</span><span role="columnheader">Service</span><span role="columnheader">Listens at</span><span role="columnheader" class="n">Backends</span>
          <span role="columnheader" class="n">Connections/s</span><span role="columnheader" class="n">Failures/s</span><span role="columnheader" class="n">In flight</span><span role="columnheader" class="n">Response</span></>}
        row={(r) => <ServiceRow key={r.service} r={r} />} />
      {shown.length < rows.length && <p class="none">{count(shown.length, "service")} of {rows.length.toLocaleString("en")}</p>}
    </section>
  );
}

function ServiceRow({ r }: { r: Row }) {
  const level = severity(r);
  const word = level === 2 ? "refusing" : r.verdict === "panic" ? "panic" : level === 1 ? `${r.out} out` : "serving";
  return (
    <a class="row" role="row" href={"#/service/" + encodeURIComponent(r.service)} title={r.why}>
      <span role="cell"><State level={level}>{word}</State></span>
      <span role="cell" class="name">{r.service}</span>
      <span role="cell" class="wide">{r.listen.join("  ")}</span>
      <span role="cell" class="n">{r.usable}/{r.backends}</span>
      <span role="cell" class="n">{rate(r.connectionsPerSecond)}</span>
      <span role="cell" class={"n" + (r.failuresPerSecond > 0 ? " level2" : "")}>{rate(r.failuresPerSecond)}</span>
      <span role="cell" class="n wide">{r.inFlight}</span>
      <span role="cell" class="n wide">{latency(r.responseSeconds ?? r.rttSeconds)}</span>
    </a>
  );
}
